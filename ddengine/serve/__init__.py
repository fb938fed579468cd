"""The edit service: an HTTP application in front of workers, each of which holds one engine (`ddengine serve`)."""
