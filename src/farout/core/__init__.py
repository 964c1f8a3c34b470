"""What every other package builds on: errors, configuration, registry, devices, storage, chunking."""
