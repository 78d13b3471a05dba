"""The guest: the agent inside it and the channel to the agent."""
