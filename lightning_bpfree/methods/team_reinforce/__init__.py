"""Teams of REINFORCE agents: stochastic units that learn from one reward."""
