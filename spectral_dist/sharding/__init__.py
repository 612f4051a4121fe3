"""Where matrices live, who orthogonalizes them, and how they get there and back."""
