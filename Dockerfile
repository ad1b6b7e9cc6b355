# The control plane (target `control-plane`) and an Envoy with the filter (target `envoy`).

FROM rust:1.95-bookworm AS build
WORKDIR /build
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --locked --release --package control-plane \
    && cargo xtask wasm \
    && mkdir /out \
    && cp target/release/control-plane target/portcullis.wasm /out/

FROM debian:bookworm-slim AS control-plane
# curl is for the health check.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/control-plane /usr/local/bin/control-plane
# No name is needed for a user that owns nothing.
USER 65532:65532
EXPOSE 8081
ENTRYPOINT ["control-plane"]
CMD ["serve", "--listen", "0.0.0.0:8081", "--log-format", "json"]

FROM envoyproxy/envoy:v1.40.0 AS envoy
WORKDIR /etc/portcullis
COPY --from=build /out/portcullis.wasm envoy/minimal.yaml ./
# Other containers are reached by name, and the listener from outside; the admin interface stays on loopback.
RUN sed --in-place \
    -e 's/{ address: 127.0.0.1, port_value: 10000 }/{ address: 0.0.0.0, port_value: 10000 }/' \
    -e 's/{ address: 127.0.0.1, port_value: 8081 }/{ address: control-plane, port_value: 8081 }/' \
    -e 's/{ address: 127.0.0.1, port_value: 8080 }/{ address: upstream, port_value: 8080 }/' \
    minimal.yaml
# Nobody from the start: the image's own start script would need root to get there.
USER 65532:65532
EXPOSE 10000
ENTRYPOINT ["envoy"]
CMD ["-c", "minimal.yaml"]
