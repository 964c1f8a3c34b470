"""A detector over HTTP: images in, scores out. Requires `farout[serve]`, which only `app` and `server` import."""
