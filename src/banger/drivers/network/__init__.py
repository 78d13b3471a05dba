"""Networks: how a machine reaches the world, and who may reach it."""
