"""What runs at a hospital: trains on the site's own images, and lets only checked numbers out."""
