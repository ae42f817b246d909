"""The hostile suite: attacks as data, and a runner that makes them through a real server."""
