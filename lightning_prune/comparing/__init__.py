"""Every method at every target speed-up: what is compared, how it is decided, validated, kept and counted."""
