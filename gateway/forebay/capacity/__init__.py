"""What a model needs in memory and what it gives for it: arithmetic, shown line by line.

No tensors and no model code: everything is computed from the shape in a config.json.
"""
