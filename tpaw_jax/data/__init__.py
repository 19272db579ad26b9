"""Records to prompts, prompts and responses to packed prefix trees."""
