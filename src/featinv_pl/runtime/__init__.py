"""How runs survive: checkpoints, exact resume, graceful stop. All private names of Lightning."""
