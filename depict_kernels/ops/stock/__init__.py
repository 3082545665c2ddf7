"""Backend "torch": the best composition of stock operators. Autograd and torch.compile see through it."""
