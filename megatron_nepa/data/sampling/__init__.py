"""Which image, crop and flip sample k of a run is, and which samples a rank loads."""
