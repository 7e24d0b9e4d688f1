"""What "compiled" becomes on a real machine: kernels checked, timed and chosen."""
