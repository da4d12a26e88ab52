"""Networks: config dataclass -> blocks -> model. They know nothing of training, data or file formats."""
