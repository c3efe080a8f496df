"""The thing itself: cameras, Gaussians, rasterizers, parametric heads, priors, and one room a method."""
