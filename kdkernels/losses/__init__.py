"""The public losses and their modules, by what they compare: logits, relations, features, contrasts."""
