"""LightningModules: what is trained, extracted and attacked."""
