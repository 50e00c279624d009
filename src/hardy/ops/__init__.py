"""Pure maths on tensors: returns, quantiles, the policy loss, schedules, plasticity measures."""
