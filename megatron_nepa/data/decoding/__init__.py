"""From encoded bytes to uint8 pixels, around images that cannot be decoded."""
