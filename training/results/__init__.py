"""What has been learned, measured and told."""
