"""Images and feature shards as LightningDataModules."""
