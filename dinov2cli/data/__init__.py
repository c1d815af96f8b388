"""From files to multi-crop batches: datasets, sampling order, augmentation, masks, collation and loaders."""
