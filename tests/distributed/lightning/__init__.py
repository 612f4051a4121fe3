"""Under Lightning's Trainer."""
