"""Pictures of what a model sees: PCA of patch features, attention maps, plots of runs."""
