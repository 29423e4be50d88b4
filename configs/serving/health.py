"""End with 0 if the service of this container is ready, and with 1 if not."""
import contextlib
import http.client
import os
import ssl
import sys

context = ssl.create_default_context()
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE   # the loopback of this container
port = int(os.environ.get("PORT", "8080"))
for connection in (http.client.HTTPConnection("127.0.0.1", port, timeout=3),
                   http.client.HTTPSConnection("127.0.0.1", port, timeout=3, context=context)):
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/v2/health/ready")
        sys.exit(connection.getresponse().status != 200)
sys.exit(1)
