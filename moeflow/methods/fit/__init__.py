"""One budget for a whole model: every layer is offered alternatives, each is measured, and the best combination is chosen."""
