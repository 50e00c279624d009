// What stands before and behind the layers of a policy in a rollout: from an environment's observation to the first layer, and
// from the actor's outputs to an action. Environments begin .. end - 1 of one member each.

// As `FrozenNormalizer` of normalizer.py, to the last bit.
void normalize(const Network& net, int64_t member, int64_t begin, int64_t end) {
    const int64_t size = net.layer->inputs;
    const double *mean = net.mean + member * size, *inverse = net.inverse + member * size;
    for (int64_t env = member * net.envs + begin; env < member * net.envs + end; ++env)
        for (int64_t i = 0; i < size; ++i) {
            const double value = (static_cast<double>(net.obs[env * size + i]) - mean[i]) * inverse[i];
            // NaN is neither below nor above, and stays.
            const double clipped = value < -net.clip ? -net.clip : value > net.clip ? net.clip : value;
            net.normalized[env * size + i] = static_cast<float>(clipped);
        }
}

// A categorical distribution's choice by inversion, as `Categorical.sample`: the first whose cumulated probability exceeds the
// noise. Where a logit is NaN every comparison fails, and the choice is 0.
void draw_choices(const Network& net, int64_t member, int64_t begin, int64_t end) {
    const Layer& actor = net.layer[net.actor];
    for (int64_t env = member * net.envs + begin; env < member * net.envs + end; ++env) {
        const float* const logits = actor.output + env * actor.outputs;
        const float largest = *std::max_element(logits, logits + actor.outputs);
        const auto weight = [&](int64_t i) { return std::exp(logits[i] - largest); };
        float total = 0;
        for (int64_t i = 0; i < actor.outputs; ++i) total += weight(i);
        // Below the total, so that no forbidden action is drawn.
        const float threshold = net.noise[env] * total;
        float cumulated = 0;
        int64_t choice = 0;
        for (int64_t i = 0; i < actor.outputs; ++i) {
            cumulated += weight(i);
            choice += cumulated <= threshold;
        }
        net.choices[env] = choice;
    }
}

// A diagonal Gaussian's action, as `DiagonalGaussian.sample`.
void draw_actions(const Network& net, int64_t member, int64_t begin, int64_t end) {
    const Layer& actor = net.layer[net.actor];
    const int64_t size = actor.outputs;
    const float* const deviation = net.deviation + member * size;
    for (int64_t env = member * net.envs + begin; env < member * net.envs + end; ++env)
        for (int64_t i = 0; i < size; ++i)
            net.actions[env * size + i] = actor.output[env * size + i] + deviation[i] * net.noise[env * size + i];
}
