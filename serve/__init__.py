"""The Ray Serve application: HTTP in front of ``memcube.service``."""
