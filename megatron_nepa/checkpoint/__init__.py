"""What a checkpoint holds, how it is stored, and the formats it converts to."""
