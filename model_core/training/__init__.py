"""Training: the recipe (config, freeze table, optimizer, losses), the data, and the loop that joins them.

Nothing is imported here, so that `model_core.training.config` stays free of torch for those who only check a recipe.
"""
