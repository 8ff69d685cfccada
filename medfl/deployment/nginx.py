"""The configuration of nginx, the only public port: it passes what a SuperNode asks of the SuperLink, and nothing else.

Open-source Flower has no authentication on its Control and Runtime interfaces, which share the SuperLink's port.
"""

import os
from pathlib import Path

from medfl.provision.study_file import StudyFile

LISTEN = "MEDFL_LISTEN"  # the address that the public port listens on
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")

# Half-open connections end after client_header_timeout. A request is read whole before the SuperLink sees it, so slow
# ones never hold a connection there. 503 is what Flower's client tries again after; any other error, as of a full disk
# or a link that starts again, would end its heartbeats for good.
TEMPLATE = """\
# Written by medfl study up. Changes are overwritten.
{user}daemon off;
pid {state}/nginx.pid;
error_log stderr warn;
worker_processes 2;
worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
  server_tokens off;
  default_type application/octet-stream;
  types {{ }}
{temporary}
  log_format refused '$time_iso8601 $remote_addr "$request_method $uri" $status $request_length';
  map $status $loggable {{ ~^[23] 0; 503 0; default 1; }}
  access_log {state}/logs/refused.log refused if=$loggable;

  limit_conn_zone $binary_remote_addr zone=connections:10m;
  limit_req_zone $binary_remote_addr zone=requests:10m rate=100r/s;
  limit_conn_status 503;
  limit_req_status 503;
  limit_conn_log_level info;
  limit_req_log_level info;

  upstream link {{ server {link}; keepalive 32; }}

  server {{
    listen {listen}:{port} ssl backlog=1024;
    ssl_certificate {folder}/authority/server.crt;
    ssl_certificate_key {folder}/authority/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305;
    ssl_session_cache shared:tls:2m;
    ssl_session_tickets off;

    limit_conn connections 100;
    limit_req zone=requests burst=500;
    client_max_body_size 64m;
    client_body_buffer_size 256k;
    client_header_buffer_size 4k;
    large_client_header_buffers 4 8k;
    client_header_timeout 10s;
    client_body_timeout 20s;
    send_timeout 30s;
    keepalive_timeout 75s;
    reset_timedout_connection on;

    location ~ "^/v1/fleet/[a-z-]{{1,40}}\\z" {{
      limit_except POST {{ deny all; }}
      proxy_pass https://link;
      proxy_http_version 1.1;
      proxy_set_header Host $host;
      proxy_set_header Connection "";
      proxy_ssl_trusted_certificate {folder}/authority/ca.crt;
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
      proxy_ssl_protocols TLSv1.2 TLSv1.3;
      proxy_ssl_session_reuse on;
      proxy_connect_timeout 10s;
      proxy_read_timeout 120s;
      proxy_send_timeout 60s;
      proxy_buffers 16 64k;
      proxy_max_temp_file_size 64m;
      proxy_next_upstream off;
      proxy_intercept_errors on;
      error_page 500 502 504 =503 /again;
    }}
    location = /again {{ internal; return 503; }}
    location = /health {{ access_log off; default_type text/plain; return 200 "ok\\n"; }}
    location / {{ return 403; }}
  }}
}}
"""


def configuration(folder: Path, study: StudyFile) -> str:
    """The text of nginx.conf; `folder` is the coordinator's, absolute."""
    state = folder / "state"
    temporary = "\n".join(f"  {name}_temp_path {state}/nginx/{name};" for name in TEMPORARY)
    host = study.link_host
    return TEMPLATE.format(
        user="user root;\n" if os.geteuid() == 0 else "",  # its workers could not write to the study's folder else
        folder=folder,
        state=state,
        temporary=temporary,
        link=f"[{host}]:{study.link_port}" if ":" in host else f"{host}:{study.link_port}",
        listen=listen(),
        port=study.port,
    )


def listen() -> str:
    """The address that the public port listens on."""
    return os.environ.get(LISTEN) or "0.0.0.0"  # noqa: S104


def prepare(folder: Path, study: StudyFile) -> Path:
    """Write nginx.conf and make the folders that it names; returns its path."""
    state = folder / "state"
    for name in ("logs", "nginx"):
        (state / name).mkdir(parents=True, exist_ok=True)
    path = state / "nginx.conf"
    path.write_text(configuration(folder, study))
    return path
