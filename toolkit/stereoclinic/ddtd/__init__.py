"""Deep Taylor decomposition of the lean of a denoiser: rules, composites, propagation, neurons."""
