"""Which parameters are matrices, and how they hold them."""
