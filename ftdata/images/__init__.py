"""Images in conversations: how many tokens an image has, computed from its width and height alone."""
