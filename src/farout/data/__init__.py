"""Image sources, the catalog of named sets, preprocessing, splits and batches."""
