"""Dense against pruned, on the same data, device and clock."""
