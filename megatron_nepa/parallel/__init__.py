"""Process groups, collectives with gradients, parallel layers and keyed random draws."""
