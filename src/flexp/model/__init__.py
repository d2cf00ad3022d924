"""The backbone, where it is cut, what its forward wears, and the personal model made of them."""
