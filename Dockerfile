# Images: the control plane (target `control-plane`) and an Envoy with the filter (target `envoy`). Nothing that compiles
# is in them.

# The toolchain, in a layer that changes with rust-toolchain.toml only. The tag is the version that this file names.
FROM rust:1.95.0-bookworm AS toolchain
WORKDIR /build
COPY rust-toolchain.toml ./
RUN rustup target add wasm32-wasip1

FROM toolchain AS source
COPY . .

# Needs neither the control plane's crates nor those of the tests.
FROM source AS build-filter
RUN --mount=type=cache,id=portcullis-filter-registry,target=/usr/local/cargo/registry \
    --mount=type=cache,id=portcullis-filter-target,target=/build/target \
    cargo run --locked --package filter-build -- /out/portcullis.wasm

FROM source AS build-control-plane
# `dev` compiles in a fraction of the time, for trying things out.
ARG PROFILE=release
# The revision of the source, for the metric portcullis_build_info.
ARG REVISION=unknown
RUN --mount=type=cache,id=portcullis-control-plane-registry,target=/usr/local/cargo/registry \
    --mount=type=cache,id=portcullis-control-plane-target,target=/build/target \
    PORTCULLIS_REVISION=$REVISION cargo build --locked --profile "$PROFILE" --package control-plane \
    && case "$PROFILE" in dev) folder=debug ;; *) folder=$PROFILE ;; esac \
    && install -D "target/$folder/portcullis" /out/portcullis

FROM debian:bookworm-slim AS control-plane
COPY --from=build-control-plane /out/portcullis /usr/local/bin/portcullis
COPY --chmod=0755 containers/make-secrets containers/probe /usr/local/bin/
# An empty volume takes over owner and mode. The group is that of the Envoy image.
RUN install --directory --owner=65532 --group=65533 --mode=0750 /secrets
# No name is needed for a user that owns nothing.
USER 65532:65532
EXPOSE 8081
ENTRYPOINT ["portcullis"]
CMD ["serve", "--listen", "0.0.0.0:8081", "--log-format", "json"]

FROM envoyproxy/envoy:v1.40.0 AS envoy
WORKDIR /etc/portcullis
COPY --from=build-filter /out/portcullis.wasm ./
COPY envoy/minimal.yaml ./
COPY --chmod=0755 containers/portcullis-envoy containers/probe /usr/local/bin/
# Not the user of the control plane: Envoy may read the sync key and the pepper, and no other secret.
USER 65533:65533
EXPOSE 10000
ENTRYPOINT ["portcullis-envoy"]
CMD ["--log-level", "warning", "--component-log-level", "wasm:info"]
