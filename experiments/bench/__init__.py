"""Programs that time things."""
