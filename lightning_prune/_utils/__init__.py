"""Small tools that are independent of pruning."""
