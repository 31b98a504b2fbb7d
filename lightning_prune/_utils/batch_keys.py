"""Under which names batches that are mappings hold what this package reads of them."""

IMAGE_KEYS = ("image", "images", "pixel_values", "inputs")
LABEL_KEYS = ("label", "labels", "target", "targets")
GROUP_KEYS = ("group", "groups")
