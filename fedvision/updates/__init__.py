"""A network's weights as one flat vector, the update between two of them, clipping, and fixed-point sums."""
