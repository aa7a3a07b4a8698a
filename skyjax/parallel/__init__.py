"""Where arrays live: the mesh of devices and the sharding rules."""
