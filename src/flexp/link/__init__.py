"""The way from near to far: messages, and the links that carry them."""
