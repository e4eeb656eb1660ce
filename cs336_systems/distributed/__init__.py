"""Many processes: how ranks are started, how they communicate, and training that is spread over them."""
