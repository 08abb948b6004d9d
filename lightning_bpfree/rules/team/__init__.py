"""The parts of a team of agents: its network, how it draws, how it is rewarded, and how it learns."""
