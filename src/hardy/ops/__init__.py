"""Pure maths on tensors: returns, quantiles, the policy loss, divergences, schedules, plasticity measures."""
