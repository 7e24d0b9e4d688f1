"""Starting points that several methods share."""
