"""Every attention architecture that some libraries can build, small, compared with an independent reading."""
