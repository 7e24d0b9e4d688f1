"""Arrays to arrays: what needs only JAX."""
